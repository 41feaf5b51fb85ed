"""How tickets are found: pure functions from weights and masks to masks, and the contract training asks of a method."""
