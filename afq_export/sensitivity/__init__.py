"""What every linear costs on every grid that its target has, and the recipe that spends a number of bytes best."""
