"""What any model consists of: its graph, its SE blocks by what they compute, its tails."""

from senet.anatomy.describe import Description as Description
from senet.anatomy.describe import describe as describe
from senet.anatomy.excitations import Anatomy as Anatomy
from senet.anatomy.excitations import Excitation as Excitation
from senet.anatomy.excitations import Step as Step
from senet.anatomy.excitations import anatomy as anatomy
from senet.anatomy.excitations import excitations as excitations
from senet.anatomy.tails import Tail as Tail
from senet.anatomy.tails import tails as tails
