"""What CapabilityGuard is made of."""
