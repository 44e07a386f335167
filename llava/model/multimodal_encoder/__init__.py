"""Vision towers: images to patch features, patches and questions to the joint space."""
