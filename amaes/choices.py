"""Names that functions and options of the command line accept, apart from the code, so that `--help` needs no torch."""

PRECISIONS = ("auto", "bf16", "fp32")  # auto: bf16 autocast on CUDA, float32 on the CPU
COMPILE = ("auto", "on", "off")  # torch.compile; auto: on CUDA where it works
DEVICES = ("auto", "cpu", "cuda")  # auto: CUDA where there is a GPU
CROPS = ("window", "patch")  # what is placed uniformly in a volume: the window that is read, or the patch inside it
WINDOWS = ("parity", "official", "none")  # margin read around a patch, so that a rotation finds data there
RECONSTRUCTION_MEANS = ("all", "masked", "masked-parity")  # voxels that the mean squared error is over
TARGETS = ("standardized", "absolute")  # of masked pretraining: by the visible voxels, or intensities of the store
SPLIT_BY = ("subject", "volume")  # what stays on one side of a split
MERGINGS = ("legacy", "fixed", "v2")  # order of the sub-grids in patch merging of Swin encoders
GRN_DIVISORS = ("mean", "sum")  # what global response normalisation of MedNeXt-v2 divides by, over the channels
STEMS = ("repeat", "random")  # weights of the first convolution where the number of input channels differs
FREEZES = ("encoder",)  # what keeps its weights in fine-tuning
TRANSFERS = ("encoder", "all")  # what fine-tuning takes from a checkpoint
ON_ERROR = ("stop", "skip")  # a step that is not finite, a case that cannot be read
EMPTY = ("nan", "one")  # score of a class that neither map has
CHECKPOINTS = ("last", "best")  # of a fold that evaluation and prediction take
ALL = "all"  # of the labelled cases: train on each, test on none
SCRATCH = "scratch"  # in place of a checkpoint: train from the beginning
