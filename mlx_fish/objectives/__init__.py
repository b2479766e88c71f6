"""What training minimises: rows of a data set to labelled tokens, and the tokens' log-probabilities to a loss."""
