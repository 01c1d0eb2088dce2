"""The contrast transfer function on the half-plane grid of ``rfft2``."""

import functools

import torch

WAVELENGTH_NUMERATOR_A = 12.2639
"""h / sqrt(2 m e) in A sqrt(V): the electron's wavelength before the relativistic term."""

RELATIVISTIC_PER_VOLT = 0.97845e-6
"""e / (2 m c^2) in 1/V. Both constants are cryoDRGN's; RELION's are larger by 3.5e-5 and 1.6e-5 of them."""


@functools.lru_cache(maxsize=8)
def _frequency_grid(box: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """k^2, kx^2 - ky^2 and 2 kx ky, each (box, box//2+1), in cycles per box: integers, exact in float32."""
    # A grid first made in inference mode could not take part in autograd afterwards.
    with torch.inference_mode(False):
        ky = (torch.fft.fftfreq(box, dtype=torch.float64) * box).round()[:, None]
        kx = (torch.fft.rfftfreq(box, dtype=torch.float64) * box).round()[None, :]
        grid = (kx**2 + ky**2, kx**2 - ky**2, 2 * kx * ky)
        return tuple(term.to(device=device, dtype=dtype) for term in grid)


def ctf_image(
    parameters: torch.Tensor, box: int, pixel_size_a: float | torch.Tensor, phases: torch.Tensor | None = None
) -> torch.Tensor:
    """CTF of a batch of particles, RELION's sign: +amplitude contrast at zero frequency, particles white.

    With the phase ``g = pi lambda dz s^2 - pi/2 Cs lambda^3 s^4 + phase shift`` the CTF is
    ``sqrt(1 - w^2) sin g + w cos g = sin(g + asin w)``; minus cryoDRGN's ``compute_ctf``, with its
    constants. Defocus along the direction of (kx, ky) is ``dz = (u + v + (u - v) cos 2(angle - a)) / 2``
    (Rohou & Grigorieff 2015, eq. 2-3). ``s^2 cos 2(angle - a)`` is written with ``kx^2 - ky^2`` and
    ``2 kx ky``, so no arc tangent is taken and nothing is undefined at zero.

    The result has the dtype of ``parameters``. Coefficients are always formed in float64; in float32
    the largest measured error is 6e-4, and 2.5e-5 r.m.s. (100 to 300 kV, defocus 0.3 to 5 um, 1 A/px,
    boxes of 64 to 360 px; cryoDRGN's on the same rows: 8e-4 and 4e-5). It sits at the corners of the
    grid, where the phase passes a thousand radians.

    Args:
        parameters: (B, 7) float32 or float64: defocus u and v (A), astigmatism angle (rad), voltage (kV),
            Cs (mm), amplitude contrast, phase shift (rad).
        box: image size D in px.
        pixel_size_a: A/px, one for all or (B,).
        phases: (B, D, D//2+1) radians that are added to g, of aberrations that the parameters cannot hold; None: 0.

    Returns:
        (B, D, D//2+1), on the unshifted grid of ``rfft2``: ky = fftfreq, kx = rfftfreq.
    """
    defocus_u, defocus_v, angle, voltage, cs, contrast, shift = parameters.double().unbind(-1)
    volts = voltage * 1e3
    wavelength = WAVELENGTH_NUMERATOR_A / torch.sqrt(volts + RELATIVISTIC_PER_VOLT * volts**2)
    # One over the squared field of view turns cycles per box into cycles per A. A number stays on the host, which would
    # have to wait for a GPU to take it over.
    per_a2 = (box * torch.as_tensor(pixel_size_a, dtype=torch.float64)) ** -2

    half_pi_wavelength = 0.5 * torch.pi * wavelength * per_a2
    astigmatism = half_pi_wavelength * (defocus_u - defocus_v)
    coefficients = (
        half_pi_wavelength * (defocus_u + defocus_v),
        -0.5 * torch.pi * cs * 1e7 * wavelength**3 * per_a2**2,
        astigmatism * torch.cos(2 * angle),
        astigmatism * torch.sin(2 * angle),
        shift + torch.asin(contrast),
    )
    k2, difference, product = _frequency_grid(box, parameters.dtype, parameters.device)
    mean, spherical, cosine, sine, constant = (c.to(parameters.dtype)[:, None, None] for c in coefficients)
    # Elementwise, not a matrix product: TF32 or autocast would destroy a phase of hundreds of radians.
    phase = torch.addcmul(mean, spherical, k2) * k2
    phase = torch.addcmul(phase, cosine, difference)
    phase = torch.addcmul(phase, sine, product)
    if phases is not None:
        phase = phase + phases
    return torch.sin(phase + constant)
