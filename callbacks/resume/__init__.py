"""What exact resumption and going back are made of."""
