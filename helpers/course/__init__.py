"""What only notebooks use."""
