# A farm in one region: a coordinator that stands by, TLS, x86_64 on demand and on spot, arm64, and one Mac.
variable "source_url" { type = string }
variable "source_sha256" { type = string }
variable "mac_image" { type = string }
variable "domain" { type = string }
variable "certificate_arn" { type = string }

provider "aws" {
  region = "eu-central-1"
}

module "farm" {
  source        = "../../aws"
  region        = "eu-central-1"
  source_url    = var.source_url
  source_sha256 = var.source_sha256
  images        = { mac = var.mac_image }
  coordinator   = { standby = true }
  front         = { domain = var.domain, certificate_arn = var.certificate_arn }
  workers = {
    x86       = { instance_types = ["c7i.2xlarge"], features = ["big-parallel"] }
    x86-cheap = { instance_types = ["c7i.xlarge", "c6i.xlarge", "m7i.xlarge"], spot = true, max = 20 }
    arm       = { instance_types = ["c7g.2xlarge"], architecture = "arm64" }
  }
  macs = {
    mac1 = { instance_type = "mac2.metal", availability_zone = "eu-central-1a" }
  }
}

output "cache_url" { value = module.farm.cache_url }
output "show_public_key" { value = module.farm.show_public_key }
output "show_api_token" { value = module.farm.show_api_token }
output "join" { value = module.farm.join }
output "front_address" { value = module.farm.front_address }
