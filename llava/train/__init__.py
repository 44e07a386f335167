"""Training: projector pretraining and finetuning of LLaVA with or without token reduction."""
