"""What is measured of a step, a layer, a router, an expert: gathered on every rank."""
