"""A storage root as a whole: what is in it, what is damaged, what nothing needs any more."""
