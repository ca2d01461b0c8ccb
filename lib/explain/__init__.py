"""What a network learned, explained: mistakes, maps, figures."""
