"""Files of weights, ours and other people's.

In: a file. Out: a dictionary of tensors and plain data; and back. Begin with `tensor_files`: .pt, .pth, .safetensors,
read without executing anything. `plan` is what a published file says about its network and the volumes it saw.
`convert` turns old pickles into such files; `__main__` is its command line.
"""
