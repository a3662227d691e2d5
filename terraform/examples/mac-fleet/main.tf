# Two Macs of a provider such as MacStadium, or of one's own, join the farm whose head is 10.0.0.5. They see it in a private
# network (a VPN, or the provider's). `ray-token` is a copy of the coordinator's.
variable "source_url" { type = string }
variable "source_sha256" { type = string }
# The ECDSA one of each, which Terraform asks a Mac for: `ssh-keyscan -t ecdsa HOST`, compared with the file on the Mac.
variable "host_keys" { type = map(string) }

module "macs" {
  source         = "../../mac-fleet"
  head           = "10.0.0.5:6379"
  source_url     = var.source_url
  source_sha256  = var.source_sha256
  ray_token_file = "${path.module}/ray-token"
  macs = {
    mini1 = { ssh_host = "10.0.0.21", host_key = var.host_keys["mini1"], slots = 4 }
    mini2 = { ssh_host = "mini2.example.org", address = "10.0.0.22", host_key = var.host_keys["mini2"], user = "builder" }
  }
}

output "workers" { value = module.macs.workers }
output "look" { value = module.macs.look }
