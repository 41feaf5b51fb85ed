"""CUDA as the runtime needs it, through whichever library is there: memory, streams, graphs, arrays on the device."""
