"""What is compared and how it is judged: arms and their classifiers, openings of test, verdicts."""
