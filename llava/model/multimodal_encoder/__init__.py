"""Vision towers: pictures to patch features, patches and questions to the joint space."""
