"""How good it is: metrics of reconstructions and of generated images."""
