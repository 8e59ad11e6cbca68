"""How the reference interaction model is trained: sequences out of episodes, batched forms, vocoder, run state."""
