"""Weights of every released layout, in and out: `load_weights`, `save_weights`."""

from senet.weights.files import HUB_PREFIX as HUB_PREFIX
from senet.weights.files import local_file as local_file
from senet.weights.files import read_state_dict as read_state_dict
from senet.weights.layouts import LAYOUTS as LAYOUTS
from senet.weights.layouts import Layout as Layout
from senet.weights.load import LoadReport as LoadReport
from senet.weights.load import load_weights as load_weights
from senet.weights.save import convert as convert
from senet.weights.save import save_weights as save_weights
from senet.weights.save import timm_name as timm_name
