"""Programs that use attention, each written as its users write it."""
