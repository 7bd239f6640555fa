import base64
import collections
import io
import json
import pickle
import re
import struct
import sys
import types
from typing import Any
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.engine import pickled, pytorch
from jaxshape.errors import InputError

# What torch 2.15 writes of {"epoch": 3, "state_dict": STATE}, with `t` a view
# of `a`, before 1.6's format and in it; compressed here.
LEGACY = zlib.decompress(
  base64.b85decode(
    r"c-n1}%Wl&^6o!3^1BRAzr(DZD;Sy@sZjx0igt{4SH5+e`<vOF<$nxaaCzU{|luaYbGq7OEWA"
    r"t@+1SA%m*iO_)wmjqUnKR%2pP3meKaAwx&z-+(Uw(gF?TnRoe^lxZL27v`k|Yf?fg%)%f55X"
    r"m7AeS-;4RTi5+f$u=jk90Qc%8o1_kl!ko$T3jpv{qg4XgH6wD)$AvBocsq`182s+a|ZORboJ"
    r"~Wv&8qGAP`FtqC2xO)f$Q%RY{vZw!C`D~~G6e(BLKImTb^H;=NpAQV-y6lrz(=0uBJ&R{0~)"
    r"QC*DMGk3-&qa<q~5j5dnTGg9bFcWy<Mq^v$l>w=BoD?H-&dtcJr8oMrlZ1Y?&;OkwH-&M}qA"
    r"6F7ey(yk;tMB0?x_>c{F#s_c6r2$KA7nTt&xUf=~MYtG|mq?FlwJt@a#^qfmlZG;ZD>NXftH"
    r";q4bq(RV3pWZ>1gj;gD&=)ii@7<k=H@AdUa#j^_NEQDNI@Zm+eH;eaEHl9aJQu2Ls)a+enC&"
    r"+!2<m)9nYNn@U-_0+i}*r7Ca)dOytKzZnsO~6NINOl;^Yu?M1&rBy-}kMPk=69SfdUUSCvRU"
    r"rxPtO7bg&br;OywtSx6mYQ1Sx-C}fysLHc8t*7l^=wHe`fMzXx2W5um)e-xFKQ>-ay8qmzO%"
    r"Km^dBHe(_s"
  )
)
ZIP = zlib.decompress(
  base64.b85decode(
    r"c-p0v-%s0C6vwY)aDun;tEK$t%DO=}(?N)BNXURft;sK*R7h1R;w3VPi>;ZM<J?fKQY9n=5|"
    r"69ezEqm_vOe!=-P2n2KiJEj_Oz+0_O!oX((b(u#x{eraFr{^&iQ`NCpYJutQdR;LYWLYwt7)"
    r"NGX1LUY+KVc6PwwsZ(LpLMr*OPlX?h9Dt8irwdGZ9;0(SjlDh^ru~n%#RSYDAm&zP@XhKI7d"
    r"&D$bX=2B1h!x*jZ#r(Rf~|VP^DEnm2%VBtPBRD3H#aO00*R=*o{8@S4@F2b!yIJFJh@i4n$T"
    r"qk7{pZr87YI`hYt+i;P&CegKE`tU8{;6uig-E`!&nAYF`m95iU%Wpc_L^33{0uhCZ8Qw*@<G"
    r"XKd!zziM#AFSQRB$s1yO>A<G40SuQ*Fvw&!3<a_lsK!X;e8@V?!ekgBo+%7h7~>v%WN>?MHS"
    r"in7@No&QvA{Zf67&1ot8au}pRy1I#)ub(VVrnPOava+F??2n&so4aNO305b3=~_7NWw9fai-"
    r"A&m`rU3cRuyrc01(HnS^6I-~sf)3ZN`hVGRUD`pT4hZU2(=lPo^u54R=gB-lB4I~PuwPb4l;"
    r"-5cuDG}W#+mE2ak$tN;DyHjf)Hkg<);0D2Gn~HiGZbLyKKz{`DN?5b^r58?VEtQcd9;>vZT>"
    r"8I50~p;>{^szZ}G2Tfn*U*W#~pXV_i9&)3q<p0f5lX60uz-FS2*Y{(<aQ%amyRO>uaLd^psG"
    r"XfjSD>zee=MC3?c(Olfi!6zgE>S&W|Ii5?=wT1H>|601`Oc}O*f9uhtnKldyaRyb_=FZH(vC"
    r"O}Yy)L(}zaDfe%pCUB;<>*5nkv%#zkR=Pw|)Lmq#QLM`|1tLcSr|5FzIluI5l0%z9){HD-`D"
    r"PN<k?Wip9Cv89A@a=JIM`PAwGkGpa1pn}W)^^!fJB|4M{IVw4<(4LPF|s`nUq@_#I;jt-!~m"
    r"{LihlV)1dBsxS!VkX~3O^!{jq)&7Z^u>Jod31aLCFRks?T*Qx@+dJolG<n&#<fyMLMtb=(e8"
    r"<BA1Ad+QX8%RxOS*Bp;eRGXzljIw2va%6MnO3NsY$OT0m`zeZ>%j$-~y*r$VKexbCKc>o3CL"
    r"s1exIneS>HI(ybB1R9aW2eJPF`~w__"
  )
)
A = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
STATE = {
  "a": A,
  "t": A.T[1:],
  "h": np.array([0.5, -2], jnp.bfloat16),
  "n": np.array(7),
  "b": np.array([True, False]),
}


def _same(got, want):
  assert list(got) == list(want)
  for name, value in want.items():
    assert got[name].dtype == value.dtype, name
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def _load(tmp_path, data):
  (tmp_path / "a.pth").write_bytes(data)
  return pytorch.load(tmp_path / "a.pth")


# Writing by hand: Python's own pickler, with stand-ins for torch's names.


class _Call:
  """Pickled as a call of a name of torch, or of any other module."""

  def __init__(self, name, *arguments):
    self.name, self.arguments = name, arguments

  def __reduce__(self):
    return _stand_in(self.name), self.arguments


class _Stored:
  def __init__(self, *identity):
    self.identity = identity


def _stand_in(name) -> Any:
  module, _, last = name.rpartition(".")
  made = type(last, (), {"__module__": module, "__qualname__": last})
  return vars(sys.modules[module]).setdefault(last, made)


def _storage(key="0", size=6, kind="Float", view=()):
  return _Stored(
    "storage", _stand_in(f"torch.{kind}Storage"), key, "cpu", size, *view
  )


def _tensor(offset=0, shape=(2, 3), strides=(3, 1), storage=None, *rest):
  return _Call(
    "torch._utils._rebuild_tensor_v2",
    storage or _storage(),
    offset,
    shape,
    strides,
    *(rest or (False, collections.OrderedDict())),
  )


def _pickle(content, monkeypatch, protocol=2):
  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      return obj.identity if isinstance(obj, _Stored) else None

  with monkeypatch.context() as context:
    for name in ("torch", "torch._utils"):
      context.setitem(sys.modules, name, types.ModuleType(name))
    file = io.BytesIO()
    made = content() if callable(content) else content
    Pickler(file, protocol).dump(made)
  return file.getvalue()


def _zip(data_pkl, entries=None, *, root="x/", packed=False, **more):
  file = io.BytesIO()
  kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
  entries = {"data/0": A.tobytes()} if entries is None else entries
  with zipfile.ZipFile(file, "w", kind) as archive:
    for name, raw in ({"data.pkl": data_pkl} | entries | more).items():
      archive.writestr(root + name, raw)
  return file.getvalue()


def _read(tmp_path, monkeypatch, content, *, protocol=2, **options):
  data = _pickle(content, monkeypatch, protocol)
  return _load(tmp_path, _zip(data, **options))


# Golden.


@pytest.mark.parametrize("data", [LEGACY, ZIP], ids=["legacy", "zip"])
def test_files_of_torch_are_read(data, tmp_path):
  got = _load(tmp_path, data)
  _same(got, STATE)
  got["a"][0, 0] = 9  # Arrays share nothing, whatever the storages did.
  assert got["t"].max() == 6
  assert all(x.flags.c_contiguous for x in got.values())


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_other_protocols_are_read(protocol, tmp_path, monkeypatch):
  content = lambda: {
    "state_dict": collections.OrderedDict(w=_tensor()),
    "numbers": [1, -2, 3.5, True, None, 2**70, b"raw", (), {1}, (1, 2, 3, 4)],
    "version": "1.0\n",
  }
  if protocol == 0:  # Names of storages are texts there.
    content = lambda: {"w": np.arange(3)}
    data = _pickle(content, monkeypatch, 0)
    _same(_load(tmp_path, _zip(data)), {"w": np.arange(3)})
    return
  got = _read(tmp_path, monkeypatch, content, protocol=protocol)
  _same(got, {"w": A})


@pytest.mark.parametrize("name", sorted(pickled.STORAGES))
@pytest.mark.parametrize("order", ["little", "big"])
def test_every_storage_in_both_byte_orders(name, order, tmp_path, monkeypatch):
  dtype = pickled.STORAGES[name]
  want = np.array([0, 1, 1, 0, 1, 0]).astype(dtype)
  raw = want.byteswap() if order == "big" else want
  got = _read(
    tmp_path,
    monkeypatch,
    lambda: {"w": _tensor(2, (2, 2), (1, 2), _storage(kind=name))},
    entries={"data/0": raw.tobytes(), "byteorder": order.encode()},
  )
  _same(got, {"w": want[[[2, 4], [3, 5]]]})


def test_newer_dtypes_lie_in_untyped_storages(tmp_path, monkeypatch):
  want = np.array([1, 60000], np.uint16)

  def content():
    untyped = _stand_in("torch.UntypedStorage")
    return {
      "w": _Call(
        "torch._utils._rebuild_tensor_v3",
        _Stored("storage", untyped, "0", "cpu", 4),
        0, (2,), (1,), False, {}, _stand_in("torch.uint16"),
      )
    }  # fmt: skip

  got = _read(
    tmp_path, monkeypatch, content, entries={"data/0": want.tobytes()}
  )
  _same(got, {"w": want})


def test_parameters_and_numpy_arrays_count(tmp_path, monkeypatch):
  want = {
    "p": A,
    "f": np.asfortranarray(A),
    "s": np.float32(2.5),
    "u": np.arange(3, dtype="u1"),
  }
  content = lambda: {
    **want,
    "p": _Call("torch._utils._rebuild_parameter", _tensor(), True, {}),
    "big": np.arange(3, dtype=">i4"),
  }
  got = _read(tmp_path, monkeypatch, content)
  _same(got, want | {"big": np.arange(3, dtype="i4")})


@pytest.mark.parametrize(
  ("content", "names"),
  [
    ({"w": 0}, ["w"]),
    ({"state_dict": {"w": 0}, "best": 0}, ["w"]),
    ({"model": {"a.w": 0}, "epoch": 3}, ["a.w"]),
    ({"net": {"state_dict": {"w": 0}}}, ["w"]),
    ({"epoch": 1, "ema": {"w": 0}, "optimizer": {"state": 0}}, ["ema.w"]),
    ({"backbone": {"w": 0}, "head": {"w": 0}}, ["backbone.w", "head.w"]),
    ({"model": 0, "v": 0}, ["model", "v"]),
    ({"state_dict": {}, "w": 0}, ["w"]),
    ({"module.w": 0}, ["module.w"]),
    ({3: {"w": 0}}, ["3.w"]),
  ],
)
def test_the_state_dict_is_found(content, names, tmp_path, monkeypatch):
  def filled(node):
    if isinstance(node, dict):
      return {k: filled(v) for k, v in node.items()}
    return node or _tensor()

  got = _read(tmp_path, monkeypatch, lambda: filled(content))
  assert list(got) == names


def test_safetensors_by_hand(tmp_path):
  header = {
    "__metadata__": {"format": "pt"},
    "h": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BOOL", "shape": [], "data_offsets": [28, 29]},
  }
  text = json.dumps(header).encode()
  data = struct.pack("<Q", len(text)) + text + A.tobytes()
  data += STATE["h"].tobytes() + b"\x02"
  got = _load(tmp_path, data)
  _same(got, {"h": STATE["h"], "a": A, "b": np.array(True)})


# Law: what is written is read back.


def test_saving_and_loading_is_the_identity(tmp_path):
  tensors = {
    **STATE,
    "f": np.asfortranarray(A),
    "big": A.astype(">f8"),
    "none": np.zeros((0, 3), np.int8),
    "Größe\n": np.float16(1.5),
    "jax": jnp.arange(3),
  }
  want = {k: np.asarray(v) for k, v in tensors.items()}
  want["big"] = A.astype("f8")
  for name in ("x.pth", "x.safetensors"):
    pytorch.save(tmp_path / name, tensors)
    _same(pytorch.load(tmp_path / name), want)
    first = (tmp_path / name).read_bytes()
    pytorch.save(tmp_path / name, tensors)
    assert (tmp_path / name).read_bytes() == first
  assert len(list(tmp_path.iterdir())) == 2


def test_a_written_file_is_as_torch_reads_it(tmp_path, monkeypatch):
  pytorch.save(tmp_path / "x.pth", {"w": A.T, "n": np.array(7)})
  archive = zipfile.ZipFile(tmp_path / "x.pth")
  assert archive.testzip() is None
  assert archive.read("x/version") == b"3\n"
  for info in archive.infolist():
    assert info.compress_type == zipfile.ZIP_STORED
    head = (tmp_path / "x.pth").read_bytes()[info.header_offset :][:30]
    start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    assert start % 64 == 0

  class Unpickler(pickle.Unpickler):
    """Python's own reads the calls that torch would get."""

    def find_class(self, module, name):
      if module == "collections":
        return collections.OrderedDict
      return lambda *given: (f"{module}.{name}", *given)

    def persistent_load(self, pid):
      return (pid[0], pid[1]()[0], *pid[2:])

  made = Unpickler(io.BytesIO(archive.read("x/data.pkl"))).load()
  empty = collections.OrderedDict()
  assert made == {
    "w": (
      "torch._utils._rebuild_tensor_v2",
      ("storage", "torch.FloatStorage", "0", "cpu", 6),
      0, (3, 2), (2, 1), False, empty,
    ),
    "n": (
      "torch._utils._rebuild_tensor_v2",
      ("storage", "torch.LongStorage", "1", "cpu", 1),
      0, (), (), False, empty,
    ),
  }  # fmt: skip
  assert archive.read("x/data/0") == A.T.tobytes()


def test_safetensors_are_written_as_described(tmp_path):
  pytorch.save(tmp_path / "x.safetensors", {"a": A, "h": STATE["h"]})
  data = (tmp_path / "x.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  assert length % 8 == 0
  assert json.loads(data[8 : 8 + length]) == {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "h": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
  }
  assert data[8 + length :] == A.tobytes() + STATE["h"].tobytes()


# Refusals: what is no such file.


@pytest.mark.parametrize(
  ("data", "text"),
  [
    (b"", "is empty"),
    (b"  <!DOCTYPE html><html>", "is a web page"),
    (b"\x1f\x8b\x08" + 50 * b"\0", "is an archive; unpack it"),
    (257 * b"\0" + b"ustar", "is an archive; unpack it"),
    (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    (b"just a text", "is no PyTorch file"),
    (pickle.dumps({"w": 1}), "is a pickle, but torch.save has not written"),
    (pickle.dumps(print), "needs builtins.print, which is not of a state"),
    (_zip(b"", root="x/y"), "a zip file without a data.pkl"),
    (_zip(b"", {"constants.pkl": b""}), "is a TorchScript program"),
    (_zip(b"}."), "holds no tensors by name"),
    (_zip(b"]."), "holds no tensors by name"),
    (_zip(pickle.dumps({"epoch": 3})), "holds no tensors by name"),
  ],
)
def test_other_files_are_told_by_name(data, text, tmp_path):
  with pytest.raises(InputError, match=rf"a\.pth .*{text}"):
    _load(tmp_path, data)


def test_paths_that_are_no_files_are_refused(tmp_path):
  with pytest.raises(InputError, match=r"none\.pth is not there"):
    pytorch.load(tmp_path / "none.pth")
  with pytest.raises(InputError, match="is a folder; name a file"):
    pytorch.load(tmp_path)
  with pytest.raises(InputError, match="is an address; download it"):
    pytorch.load("https://example.com/a.pth")
  with pytest.raises(InputError, match=r"there is no folder .*none"):
    pytorch.save(tmp_path / "none" / "a.pth", {"w": A})
  for name in ("a.pth", "a.safetensors"):
    with pytest.raises(InputError, match="cannot hold w: <U1 has no name"):
      pytorch.save(tmp_path / name, {"w": np.array("x")})
  assert not list(tmp_path.iterdir())


# Refusals: names, which are never imported.


@pytest.mark.parametrize(
  "name", ["os.system", "builtins.eval", "torch.nn.Module", "jaxshape.x.y"]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_names_are_told_and_not_called(name, protocol, tmp_path):
  module, _, last = name.rpartition(".")
  data = {
    2: f"\x80\x02c{module}\n{last}\n(U\x04truetR.".encode("latin1"),
    4: pickle.PROTO
    + b"\x04"
    + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, last))
    + b"\x93(tR.",
  }[protocol]
  text = f"needs {re.escape(name)}, which is not of a state dict"
  with pytest.raises(InputError, match=rf"a\.pth {text}"):
    _load(tmp_path, _zip(data))


def test_nothing_is_imported(tmp_path, monkeypatch):
  folder = tmp_path / "trap"
  folder.mkdir()
  (folder / "torch.py").write_text("raise RuntimeError('imported')\n")
  monkeypatch.syspath_prepend(folder)
  monkeypatch.delitem(sys.modules, "torch", raising=False)
  _same(_load(tmp_path, ZIP), STATE)
  assert "torch" not in sys.modules


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n)R"


@pytest.mark.parametrize(
  ("opcodes", "text"),
  [
    (b"ccollections\nOrderedDict\nX\x01\0\0\0aR.", "calls what is no name"),
    (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
    (b"ctorch\nSize\n}b.", "changes what has no state"),
    (b"(ios\nsystem\n.", "has the opcode INST"),
    (b"\x82\x01.", "has the opcode EXT1"),
    (b"}))s.", "a key of type tuple"),
    (b"}Q.", "is truncated or damaged in its pickle"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "damaged in its pickle"),
    (b"cnumpy\ndtype\nU\x02O8\x85R.", "holds no tensors"),
    (ARRAY + b"K\x01b.", "damaged in its pickle"),
    (b"}U\x01a" + ARRAY + b"(NNNNNtbs.", "holds a, which is no plain NumPy"),
    (b"}U\x01a" + ARRAY + b"s.", "holds a, which is no plain NumPy"),
    (
      b"}U\x01a" + ARRAY + b"(K\x01)cnumpy\ndtype\nU\x02u1\x85R\x89"
      b"c_codecs\nencode\nU\x01aU\x06base64\x86Rtbs.",
      "holds a, which is no plain NumPy",
    ),
    (b"a.", "is truncated or damaged in its pickle"),
    (b"j\xff\xff\xff\xff.", "is truncated or damaged in its pickle"),
    (b"\x8b\xff\xff\xff\x7fab", "is truncated or damaged in its pickle"),
    (b"B\xff\xff\xff\x7fab", "is truncated or damaged in its pickle"),
    (b"}", "is truncated or damaged in its pickle"),
    (b"", "is truncated or damaged in its pickle"),
  ],
)
def test_pickles_that_no_state_dict_has(opcodes, text, tmp_path):
  with pytest.raises(InputError, match=rf"a\.pth .*{text}"):
    _load(tmp_path, _zip(b"\x80\x02" + opcodes))


def test_objects_and_the_marks_of_conjugates_are_refused(tmp_path, monkeypatch):
  with pytest.raises(InputError, match="holds w, which is no plain NumPy"):
    _read(
      tmp_path, monkeypatch, lambda: {"w": np.array([None, {}], dtype=object)}
    )
  marked = lambda: {
    "w": _tensor(0, (1,), (1,), None, False, {}, {"conj": True})
  }
  with pytest.raises(InputError, match="marked as conjugate or negative"):
    _read(tmp_path, monkeypatch, marked)


def test_short_files_do_not_become_long_work(tmp_path):
  # Each list holds the one before it twice; the last dictionary holds itself.
  twice = b"]" + b"".join(b"q%c](h%ch%ce" % (3 * (i,)) for i in range(1, 200))
  for opcodes in (
    b"}q\x00X\x05\0\0\0modelh\x00s.",
    b"}X\x01\0\0\0a" + twice + b"s.",
    b"}U\x01a" + 5000 * b"}U\x01a" + b"N" + 5001 * b"s" + b".",
    b"}(" + 100000 * b")\x85" + b"Ns.",
    2000 * b"(" + b".",
  ):
    with pytest.raises(InputError):
      _load(tmp_path, _zip(b"\x80\x02" + opcodes))


# Refusals: tensors that reach beyond their numbers.


@pytest.mark.parametrize(
  "window",
  [
    (1, (2, 3), (3, 1)),
    (0, (2, 3), (4, 1)),
    (-1, (2,), (1,)),
    (0, (2,), (-1,)),
    (0, (-2, 3), (3, 1)),
    (0, (2, 3), (3,)),
    (0, (2.0,), (1,)),
    (0, (True,), (1,)),
    (2**70, (1,), (1,)),
    (0, (1,) * 65, (1,) * 65),
    (0, (2**40,), (1,)),
    (0, (0,) + (2**62,) * 9, (1,) * 10),
  ],
)
def test_windows_beyond_a_storage_are_refused(window, tmp_path, monkeypatch):
  with pytest.raises(InputError, match=r"a\.pth is damaged(:| at) w[, ]"):
    _read(tmp_path, monkeypatch, lambda: {"w": _tensor(*window)})


def test_expanded_axes_are_read_up_to_a_measure(tmp_path, monkeypatch):
  got = _read(
    tmp_path, monkeypatch, lambda: {"w": _tensor(1, (100, 2), (0, 1))}
  )
  np.testing.assert_array_equal(got["w"], np.tile([2.0, 3.0], (100, 1)))
  with pytest.raises(InputError, match="many times larger than the file"):
    _read(tmp_path, monkeypatch, lambda: {"w": _tensor(0, (2**40, 1), (0, 1))})


def test_entries_that_lack_or_claim_too_much_are_refused(tmp_path, monkeypatch):
  data = _pickle(lambda: {"w": _tensor()}, monkeypatch)
  with pytest.raises(InputError, match=r"lacks its entry x/data/0"):
    _load(tmp_path, _zip(data, {}))
  with pytest.raises(InputError, match=r"storage of w has 20 of 24 bytes"):
    _load(tmp_path, _zip(data, {"data/0": A.tobytes()[:20]}))
  with pytest.raises(InputError, match=r"unknown byte order b'middle'"):
    _load(tmp_path, _zip(data, byteorder=b"middle"))
  bomb = _zip(data, {"data/0": bytes(10**6)}, packed=True)
  with pytest.raises(InputError, match=r"has a compressed entry x/data"):
    _load(tmp_path, bomb)
  whole = _zip(data)
  liar = whole.replace(
    struct.pack("<II", 24, 24), struct.pack("<II", *2 * [9**9])
  )
  with pytest.raises(
    InputError, match=r"claims more than it holds, in x/data/0"
  ):
    _load(tmp_path, liar)
  flipped = whole.replace(A.tobytes(), b"\x01" + A.tobytes()[1:])
  with pytest.raises(InputError, match=r"damaged in x/data/0 \(Bad CRC-32"):
    _load(tmp_path, flipped)


@pytest.mark.parametrize("data", [LEGACY, ZIP], ids=["legacy", "zip"])
def test_every_truncation_is_told(data, tmp_path):
  for end in [*range(1, len(data), 97), len(data) - 1]:
    with pytest.raises(InputError, match=r"a\.pth"):
      _load(tmp_path, data[:end])


def test_damaged_storages_of_the_old_format_are_refused(tmp_path):
  count = struct.pack("<q", 6) + A.tobytes()
  assert LEGACY.count(count) == 1
  for number in (-1, 2**40, 5):
    broken = LEGACY.replace(count, struct.pack("<q", number) + A.tobytes())
    with pytest.raises(InputError, match=r"a\.pth is truncated"):
      _load(tmp_path, broken)


@pytest.mark.parametrize(
  ("entry", "text"),
  [
    ({"data_offsets": [0, 28]}, "damaged at w"),
    ({"data_offsets": [-24, 0]}, "damaged at w"),
    ({"shape": [2, 4]}, "damaged at w"),
    ({"shape": [-2, -3]}, "damaged at w"),
    ({"shape": None}, "damaged in its header"),
    ({"dtype": "F33"}, "w of an unknown dtype"),
    ({"dtype": ["F32"]}, "damaged in its header"),
  ],
)
def test_damaged_safetensors_are_refused(entry, text, tmp_path):
  good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
  header = json.dumps({"w": good | entry}).encode()
  data = struct.pack("<Q", len(header)) + header + A.tobytes()
  with pytest.raises(InputError, match=rf"a\.pth .*{text}"):
    _load(tmp_path, data)
  for broken in (data[:30], struct.pack("<Q", 2**33) + data[8:]):
    with pytest.raises(InputError, match=r"header is too long"):
      _load(tmp_path, broken)
