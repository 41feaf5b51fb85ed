"""Networks as ``torch.export`` programs, written and read so that nothing in a file is unpickled or run as code."""
