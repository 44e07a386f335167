"""Language models that read images."""
