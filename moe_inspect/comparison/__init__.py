"""Two traces of the same tokens: are they the same routing, and where not?"""
