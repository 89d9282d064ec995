"""Load, check, freeze and save models; their heads, and the weights that can be changed."""
