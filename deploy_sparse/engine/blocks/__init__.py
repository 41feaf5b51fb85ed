"""Block-packed layers below the network: their layout, the kernel that runs them, TensorRT's plug-in around it."""
