"Draws the site's logo, favicon and social card into nbs/images: python tools/logo.py. The kernels on the card are those of a committed training run."
import io
from pathlib import Path
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from flexconv import create_model, position_grid
from flexconv.layers import conv_layers
from flexconv.plot import show_kernel

images = Path(__file__).parent.parent/'nbs/images'
run = Path(__file__).parent.parent/'nbs/experiments/results/cifar10-flexnet7-half'


def mark(n=5):
    "The kernel of the logo, an oblique Gabor function on n×n pixels, in [-1, 1]."
    y, x = position_grid(n, 2)
    return torch.exp(-1.4*(x**2 + y**2))*torch.cos(2.2*(x - 0.8*y))


def svg(k, size=32):
    "A kernel as SVG, one rounded square for each pixel, in the colours of all our pictures."
    step, color = size/len(k), matplotlib.colormaps['RdBu_r']
    box = lambda i, j: f'<rect x="{j*step + 0.3:.2f}" y="{i*step + 0.3:.2f}" width="{step - 0.6:.2f}" height="{step - 0.6:.2f}" rx="0.8" fill="{matplotlib.colors.to_hex(color(0.5 + 0.5*k[i, j].item()))}"/>'
    boxes = '\n'.join(box(i, j) for i in range(len(k)) for j in range(len(k)))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">\n{boxes}\n</svg>\n'


def png(fig, **kwargs):
    "A figure's bytes, the same on every run."
    out = io.BytesIO()
    fig.savefig(out, format='png', metadata={'Software': None}, **kwargs)
    plt.close(fig)
    return out.getvalue()


def favicon(k):
    "The mark as a picture of 64×64 pixels."
    fig = plt.figure(figsize=(1, 1))
    ax = fig.add_axes([0, 0, 1, 1]); ax.imshow(k, cmap='RdBu_r', vmin=-1, vmax=1); ax.axis('off')
    return png(fig, dpi=64)


def trained():
    "The FlexNet-7 of the card, and of the front page."
    model = create_model('flexnet7', width=12)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(run/'model.safetensors').items()})
    return model


def card():
    "1200×630 pixels for links in messages: the name, what it is, and a strip of learned kernels, shallow to deep."
    layers = list(conv_layers(trained()).values())[::2]
    fig = plt.figure(figsize=(12, 6.3), facecolor='white')
    fig.text(0.05, 0.80, 'flexconv', fontsize=64, weight='bold', color='#222')
    fig.text(0.05, 0.68, 'Convolutions whose kernel is a continuous function\nand whose size is learned', fontsize=27, color='#444', va='top', linespacing=1.4)
    for i, layer in enumerate(layers):
        w = 0.9/len(layers)
        ax = fig.add_axes([0.05 + i*w, 0.1, 0.92*w, 0.92*w*12/6.3])
        show_kernel(layer, i, i % layer.in_channels, ax, '×'.join(map(str, layer.size)), frame=19)
        ax.title.set_fontsize(13)
    fig.text(0.05, 0.05, 'FlexNet-7, trained on CIFAR-10, shallow to deep', fontsize=15, color='#666')
    return png(fig, dpi=100)


if __name__ == '__main__':
    (images/'logo.svg').write_text(svg(mark()))
    (images/'favicon.png').write_bytes(favicon(mark()))
    (images/'card.png').write_bytes(card())
