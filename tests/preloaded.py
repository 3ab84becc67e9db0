"""What training imports, for processes that are forked with it."""

import scipy.ndimage
import torch._dynamo

import train_finetune
import train_pretrain
