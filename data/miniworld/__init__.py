"""The miniature world: small videos, sounds, speech and images with questions about them, made from a seed.

A world that two cores can learn, yet every part of the path is the real one: MP4, WAV and PNG files, annotations in
published formats, questions that neither picture nor sound alone can answer.

    python -m data.miniworld --out DIR --split train --num 1000

scene.py what happens in a clip; draw.py its frames; sound.py its sound; speech.py eSpeak NG; ask.py questions and
their answers; german.py the same in German; tell.py scenes in words; write.py files and annotations.
"""
