"""Which part of the input made the network decide so."""
