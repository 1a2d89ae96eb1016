"""How many images the figures of fidelity need."""

# Images of a set, below which its figures mean nothing.
LEAST = 20
# Images below which a Fréchet distance depends mostly on their number.
FRECHET_LEAST = 2048
# An image is near to train if it is nearer than all but this share of val, and val has at least so
# many images.
NEAR, NEAR_LEAST = 0.01, 100
