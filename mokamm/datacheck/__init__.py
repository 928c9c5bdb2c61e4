"""`mokamm data check CONFIG`: what a training would see of its data, found without one.

sources --walk--> a Finding a row --summary--> counts, lengths, troubles, advice --> table, JSON, lengths.png
"""
