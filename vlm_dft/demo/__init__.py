"""Small image-text problems that a tiny model can learn in minutes on two cores. Torch-free, but for ``base``.

scenes      what is in a picture, and how it is drawn
questions   what is asked about a scene, and its answer
wording     how a question is put, and how reasoning is told: several phrasings for every step
problems    seeded problems with balanced answers, training and held-out apart; the level of blind guessing
write       WeThink records and the three benchmarks' own forms
base        the random tiny Qwen2.5-VL that starts the demo
"""
