"""KDD Cup 1999 network connections: the format of the files, the five classes, and our encoding for a network.

A connection has 41 features: three symbols (protocol, service, flag), whole numbers such as bytes and counts, rates from
0 to 1, and yes-or-no flags. Its label is an attack or `normal`; the contest scores five classes of labels.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping

import numpy as np

from lib.datasets.formats import CorruptData

CLASSES = ("normal", "dos", "probe", "r2l", "u2r")

#: Each label, without its full stop, under its class, as in the lists of attacks that come with the data.
LABELS = {
    "normal": "normal",
    "dos": "apache2 back land mailbomb neptune pod processtable smurf teardrop udpstorm",
    "probe": "ipsweep mscan nmap portsweep saint satan",
    "r2l": "ftp_write guess_passwd imap multihop named phf sendmail snmpgetattack snmpguess spy warezclient warezmaster "
    "worm xlock xsnoop",
    "u2r": "buffer_overflow httptunnel loadmodule perl ps rootkit sqlattack xterm",
}
_CLASS_OF = {f"{label}.": CLASSES.index(name) for name, labels in LABELS.items() for label in labels.split()}

#: The columns of the files in order; the label follows.
COLUMNS = tuple(
    """duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot num_failed_logins logged_in
    num_compromised root_shell su_attempted num_root num_file_creations num_shells num_access_files num_outbound_cmds
    is_host_login is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate same_srv_rate
    diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count dst_host_same_srv_rate dst_host_diff_srv_rate
    dst_host_same_src_port_rate dst_host_srv_diff_host_rate dst_host_serror_rate dst_host_srv_serror_rate
    dst_host_rerror_rate dst_host_srv_rerror_rate""".split()
)

#: The symbols that occur, by column; a symbol is stored as its place in this list.
SYMBOLS = {
    "protocol_type": ("icmp", "tcp", "udp"),
    "service": tuple(
        """IRC X11 Z39_50 auth bgp courier csnet_ns ctf daytime discard domain domain_u echo eco_i ecr_i efs exec finger ftp
        ftp_data gopher hostnames http http_443 icmp imap4 iso_tsap klogin kshell ldap link login mtp name netbios_dgm
        netbios_ns netbios_ssn netstat nnsp nntp ntp_u other pm_dump pop_2 pop_3 printer private red_i remote_job rje
        shell smtp sql_net ssh sunrpc supdup systat telnet tftp_u tim_i time urh_i urp_i uucp uucp_path vmnet whois""".split()
    ),
    "flag": ("OTH", "REJ", "RSTO", "RSTOS0", "RSTR", "S0", "S1", "S2", "S3", "SF", "SH"),
}

#: Durations, bytes and counts: their logarithm enters, since they spread over up to nine decades.
AMOUNTS = frozenset(
    """duration src_bytes dst_bytes wrong_fragment urgent hot num_failed_logins num_compromised su_attempted num_root
    num_file_creations num_shells num_access_files num_outbound_cmds count srv_count dst_host_count
    dst_host_srv_count""".split()
)


def parse(data: bytes, limit: int = 1 << 28) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 41), float64 with symbols as places in `SYMBOLS`, and classes (n,), uint8, of a gzipped table.

    Raises `CorruptData` for anything but the published format: another number of columns, an unknown symbol or label,
    more than `limit` bytes of text.
    """
    import pandas as pd

    try:
        with gzip.open(io.BytesIO(data)) as stream:
            text = stream.read(limit + 1)
        if len(text) > limit:
            raise CorruptData(f"unpacks to more than {limit} bytes")
        if not text:
            raise CorruptData("no rows")
        dtypes = {name: str if name in SYMBOLS else np.float64 for name in COLUMNS} | {"label": str}
        table = pd.read_csv(
            io.BytesIO(text),
            header=None,
            names=[*COLUMNS, "label"],
            dtype=dtypes,
            index_col=False,
            keep_default_na=False,
        )
    except (OSError, EOFError, ValueError) as error:  # CorruptData is a ValueError and keeps its text
        raise CorruptData(f"unreadable table of connections: {error}") from error
    features = np.empty((len(table), len(COLUMNS)))
    for k, name in enumerate(COLUMNS):
        if name in SYMBOLS:
            codes = pd.Index(SYMBOLS[name]).get_indexer(table[name])
            if (codes < 0).any():
                raise CorruptData(f"unknown {name} {table[name][codes < 0].iloc[0]!r}")
            features[:, k] = codes
        else:
            features[:, k] = table[name]
    classes = table["label"].map(_CLASS_OF)
    if classes.isna().any():
        raise CorruptData(f"unknown label {table['label'][classes.isna()].iloc[0]!r}")
    return features, classes.to_numpy(np.uint8)


def encoded_inputs() -> tuple[str, ...]:
    """Names of the inputs that `encode` makes: the numbers first, in order, then one for each symbol."""
    numbers = (name for name in COLUMNS if name not in SYMBOLS)
    symbols = (f"{column}={symbol}" for column, known in SYMBOLS.items() for symbol in known)
    return (*numbers, *symbols)


def moments(features: np.ndarray) -> dict[str, np.ndarray]:
    """What `encode` needs of the training part: mean, deviation, least and largest value of each number, as it enters."""
    numbers = _numbers(features)
    return {"mean": numbers.mean(0), "std": numbers.std(0), "low": numbers.min(0), "high": numbers.max(0)}


def encode(features: np.ndarray, scaling: str, moments: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inputs of a network, (n, 119) float32: `encoded_inputs` names them.

    A number enters as it is, a duration, a number of bytes or a count x as log(1 + x); then `standardized` subtracts the
    training mean and divides by the training deviation, `unit` takes the training minimum to 0 and the maximum to 1. A
    number that is constant in training is only shifted. A symbol is one input that is 1, among zeros.
    """
    numbers = _numbers(features)
    if scaling == "unit":
        offset, unit = moments["low"], moments["high"] - moments["low"]
    else:
        offset, unit = moments["mean"], moments["std"]
    inputs = np.zeros((len(features), len(encoded_inputs())), dtype=np.float32)
    inputs[:, : numbers.shape[1]] = (numbers - offset) / np.where(unit > 0, unit, 1)
    first, rows = numbers.shape[1], np.arange(len(features))
    for column, known in SYMBOLS.items():
        inputs[rows, first + features[:, COLUMNS.index(column)].astype(np.int64)] = 1
        first += len(known)
    return inputs


def _numbers(features: np.ndarray) -> np.ndarray:
    columns = [k for k, name in enumerate(COLUMNS) if name not in SYMBOLS]
    numbers = features[:, columns]
    amounts = [COLUMNS[k] in AMOUNTS for k in columns]
    numbers[:, amounts] = np.log1p(numbers[:, amounts])
    return numbers
