"""What is known about kjj0/fineweb10B-gpt2 whoever delivers it: its shards' sha256, which no mirror can change.

The hashes are the hub's LFS ids at `REVISION`, as its API and a shard's LFS pointer show them. They come from what
others have published, and only where at least two lists agree that were not made from each other (three for the
validation shard and the first nine). Shards without one are trusted on first use: their manifest entry is the hash that
the hub, or HF_ENDPOINT, announced at the first download.
"""

from __future__ import annotations

from nanogpt.data.shards import train_name, val_name

HUB = "https://huggingface.co"  # any other address is a mirror
REVISION = "889765ea1f903759787add96995d81171b632d0c"
SHARD_BYTES = 200_001_024  # size of each pinned shard: 100 M tokens
_TRAIN = (
    "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e",
    "d4ba8d2d740905a836a4222d2aff01750560e7d49a51a745a1b3235520aec2cd",
    "f70fa272369730fd9e39f1848bfe4daa3289b6e490c1e7762777f00ea8b66246",
    "d8d88850f89fe2030e866380e90d544167467d407080403b830b903543925835",
    "36cef3fc41863eb6731b41e986edde38e368853ee6deb87b928990bf445a119c",
    "d80e5b209983e636655fc738fdf281f0132f0298bf4c0848f7e7a6bea6ca06f0",
    "fa9f94dce61686b5467bc6cd3078424203db23ac254d804a6d8d5d440afc1e11",
    "308e6937af5d78b7489a8aac3a3951dced5b46103e613f8bc4eb543f5092526c",
    "1635300891634346ecff3a78d6e489a69c647885f0dcd249fe3eb76fac683458",
    "72e88f66104dacca163eeb3a00fe40a45a821d2ecd4fb9ce343808996e5d2f5e",
    "99edff412654ca6e06d4b3ca563acd8937ee6042f49d009526b8f1074f4d7300",
    "92a2dc78e3971ac2a36ef3e9f19c92533bc35ef2dd735bb6759e7b864e301084",
    "6cc3884bf19a2d9b4a12d52e4861276da2e3c6614ce97e6bfa0769d701f7a4c5",
    "6bc06a838d5a258fb51a3c2a3d14fd784f83b173f408d8d2d3f85b3290094a96",
    "09ad252e5d641862f89c31e4f0fa9559933d3e2bc6f657fc05f63166c2d74741",
    "56e97975654bb7a1f08f1397dd7894146dd7f8c36bc9fdd71da9675c43ab9a85",
    "a51e60d3f9fce16a9dbcb20e5333e1c8e379acf3a703e63b1fecfef49aa17458",
    "8a35ee9b00834e085e20383711d1fa13efe9d05d3d20161cebd60d73ac935fe9",
)
SHA256: dict[str, str] = {
    val_name(): "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640",
    **{train_name(index): sha256 for index, sha256 in enumerate(_TRAIN, start=1)},
}
