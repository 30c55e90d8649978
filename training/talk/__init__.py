"""Everything in the demo model's corpus that is neither a story nor a question with one authored answer.

Text lives in the *.txt files beside these programs; the programs only choose, fill and join. Every
sampler takes a `random.Random` and gives `Turns`: a list of (user, assistant) texts.
"""
