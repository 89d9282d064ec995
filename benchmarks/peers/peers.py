"""All libraries that ``worker.py`` measures, by name; each imports its own when it is made."""

from __future__ import annotations

from peer import Kfade
from peer_bergson import Bergson
from peer_curvlinops import Curvlinops
from peer_kronfluence import Kronfluence

JOBS = ("covariance", "kfac", "ekfac")
PEERS = {peer.name: peer for peer in (Kfade, Kronfluence, Curvlinops, Bergson)}
