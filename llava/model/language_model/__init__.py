"""Language models that read pictures."""
