"""The projector from vision width to LLM width."""
