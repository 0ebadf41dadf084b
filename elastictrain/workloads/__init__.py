"""What is trained: modules, losses and optimizer settings behind one Protocol, without a word of ranks or ZeRO."""
