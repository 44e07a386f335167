"""The model: towers, token reduction, projector, splice, language model, loading."""
