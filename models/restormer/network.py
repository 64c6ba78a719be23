"""Restormer in PyTorch (Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration",
CVPR 2022), with the parameter names and shapes of the authors' checkpoints.

All tensors are (B, C, H, W); H and W must be multiples of 8, since the network halves them three times.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """What tells one Restormer variant from another.

    The defaults are the published network for deblurring and deraining: 26 126 644 parameters.
    """

    in_channels: int = 3
    out_channels: int = 3
    dim: int = 48
    num_blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    num_refinement_blocks: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    ffn_expansion: float = 2.66
    bias: bool = False
    norm_bias: bool = True  # False: the BiasFree normalisation of the denoising checkpoints
    dual_pixel: bool = False  # defocus deblurring from a dual-pixel pair: skip convolution, no residual output

    @property
    def total_blocks(self) -> int:
        """Transformer blocks in the whole network; levels 1 to 3 occur in the encoder and in the decoder."""
        return 2 * sum(self.num_blocks[:3]) + self.num_blocks[3] + self.num_refinement_blocks


class LayerNormWithBias(nn.Module):
    """Layer normalisation over the last axis (section 3, "layer normalization")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class LayerNormBiasFree(nn.Module):
    """As the authors' BiasFree variant: divides by the deviation, but does not subtract the mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        return x / torch.sqrt(variance + 1e-5) * self.weight


class ChannelLayerNorm(nn.Module):
    """Normalises each pixel over its channels: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, dim: int, norm_bias: bool) -> None:
        super().__init__()
        self.body = LayerNormWithBias(dim) if norm_bias else LayerNormBiasFree(dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        return self.body(tokens).transpose(1, 2).unflatten(2, (height, width))


class TransposedAttention(nn.Module):
    """Multi-Dconv head transposed attention, MDTA (section 3.1): channels attend to channels."""

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, kernel_size=3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = (
            part.flatten(2).unflatten(1, (self.num_heads, -1))  # (B, heads, C/heads, H·W)
            for part in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        )
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)  # (B, heads, C/heads, C/heads)
        return self.project_out((attention @ v).flatten(1, 2).unflatten(2, (height, width)))


class GatedFeedForward(nn.Module):
    """Gated-Dconv feed-forward network, GDFN (section 3.2)."""

    def __init__(self, dim: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, hidden * 2, kernel_size=1, bias=bias)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, kernel_size=3, padding=1, groups=hidden * 2, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, architecture: Architecture) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(dim, architecture.norm_bias)
        self.attn = TransposedAttention(dim, num_heads, architecture.bias)
        self.norm2 = ChannelLayerNorm(dim, architecture.norm_bias)
        self.ffn = GatedFeedForward(dim, architecture.ffn_expansion, architecture.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Overlapping 3×3 patches; a module of its own because the checkpoints call its weight `patch_embed.proj`."""

    def __init__(self, in_channels: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """(B, C, H, W) → (B, 2·C, H/2, W/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """(B, C, H, W) → (B, C/2, 2·H, 2·W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Restormer(nn.Module):
    """A four-level encoder-decoder of transformer blocks (figure 2).

    Input (B, in_channels, H, W) and output (B, out_channels, H, W), both in the range 0…1 by convention.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        dim = a.dim

        def level(width: int, num_heads: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(width, num_heads, a) for _ in range(depth)))

        self.patch_embed = PatchEmbedding(a.in_channels, dim, a.bias)
        self.encoder_level1 = level(dim, a.heads[0], a.num_blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(dim * 2, a.heads[1], a.num_blocks[1])
        self.down2_3 = Downsample(dim * 2)
        self.encoder_level3 = level(dim * 4, a.heads[2], a.num_blocks[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = level(dim * 8, a.heads[3], a.num_blocks[3])

        self.up4_3 = Upsample(dim * 8)
        self.reduce_chan_level3 = nn.Conv2d(dim * 8, dim * 4, kernel_size=1, bias=a.bias)
        self.decoder_level3 = level(dim * 4, a.heads[2], a.num_blocks[2])
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, kernel_size=1, bias=a.bias)
        self.decoder_level2 = level(dim * 2, a.heads[1], a.num_blocks[1])
        self.up2_1 = Upsample(dim * 2)
        self.decoder_level1 = level(dim * 2, a.heads[0], a.num_blocks[0])

        self.refinement = level(dim * 2, a.heads[0], a.num_refinement_blocks)
        if a.dual_pixel:
            self.skip_conv = nn.Conv2d(dim, dim * 2, kernel_size=1, bias=a.bias)
        self.output = nn.Conv2d(dim * 2, a.out_channels, kernel_size=3, padding=1, bias=a.bias)

    def forward(self, image: Tensor) -> Tensor:
        embedding = self.patch_embed(image)
        encoder1 = self.encoder_level1(embedding)
        encoder2 = self.encoder_level2(self.down1_2(encoder1))
        encoder3 = self.encoder_level3(self.down2_3(encoder2))
        latent = self.latent(self.down3_4(encoder3))

        x = self.reduce_chan_level3(torch.cat([self.up4_3(latent), encoder3], dim=1))
        x = self.decoder_level3(x)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), encoder2], dim=1))
        x = self.decoder_level2(x)
        x = self.decoder_level1(torch.cat([self.up2_1(x), encoder1], dim=1))
        x = self.refinement(x)

        if self.architecture.dual_pixel:
            return self.output(x + self.skip_conv(embedding))
        return self.output(x) + image
