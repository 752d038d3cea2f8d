"""Colours of all figures: people with any colour vision tell them apart (Okabe and Ito 2008)."""

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#8A8A8A"
# One for each of several models, by number; more than six begin again.
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
