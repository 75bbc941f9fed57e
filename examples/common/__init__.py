"""What the examples share: data, networks, the methods by name, cutting dead filters, pictures."""
