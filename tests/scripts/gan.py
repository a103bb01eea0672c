"""A GAN after DCGAN's tutorial: two models, two optimizers, the critic is stepped first."""

import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(3)
nz = 4
netG = nn.Sequential(
    nn.ConvTranspose2d(nz, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
    nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
)  # fmt: skip
netD = nn.Sequential(
    nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(8, 1, 4, 1, 0, bias=False), nn.Sigmoid(),
)  # fmt: skip
criterion = nn.BCELoss()
fixed_noise = torch.randn(4, nz, 1, 1)
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
data = torch.randn(6, 8, 1, 8, 8).tanh()

for epoch in range(2):
    for i, real in enumerate(data):
        netD.zero_grad()
        output = netD(real).view(-1)
        errD_real = criterion(output, torch.ones(8))
        errD_real.backward()
        fake = netG(torch.randn(8, nz, 1, 1))
        errD_fake = criterion(netD(fake.detach()).view(-1), torch.zeros(8))
        errD_fake.backward()
        optimizerD.step()
        netG.zero_grad()
        errG = criterion(netD(fake).view(-1), torch.ones(8))
        errG.backward()
        optimizerG.step()
        print(f"[{epoch}][{i}] {errD_real.item() + errD_fake.item()} {errG.item()}")
    with torch.no_grad():
        print(netG(fixed_noise).sum().item())

torch.save({"G": netG.state_dict(), "D": netD.state_dict(), "optimizer": optimizerG.state_dict()}, "gan.pt")
