"""The miniature base: a small LLM, three small encoders and projectors after stage 1, made by `python -m mokamm.mini.build`.

The weights lie beside this file in the formats of the real ones and are loaded by the same code, as a local path in
place of a hub name.
"""
