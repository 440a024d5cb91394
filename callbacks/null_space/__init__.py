"""What `NullSpaceProjection` is made of."""
