locals {
  zone   = { fsn1 = "eu-central", nbg1 = "eu-central", hel1 = "eu-central", ash = "us-east", hil = "us-west", sin = "ap-southeast" }[var.location]
  labels = { farm = var.name }
  # The coordinator keeps its address, because the head's stands in every worker.
  address = cidrhost(var.cidr, 10)
  head    = "${local.address}:6379"
  url     = var.domain == "" ? "http://${local.address}:7878" : "https://${var.domain}"
  given   = "/etc/drover/given"
  servers = merge([
    for name, group in var.workers : { for number in range(group.count) : "${var.name}-${name}-${number + 1}" => group }
  ]...)
  farm_toml = join("\n", concat([
    "host = \"0.0.0.0\"",
    "secrets_dir = \"/var/lib/drover/secrets\"",
    "ray_address = ${jsonencode(local.head)}",
    "ray_host = ${jsonencode(local.address)}",
    "public_url = ${jsonencode(local.url)}",
  ], var.object_store.url == "" ? [] : ["object_store_url = ${jsonencode(var.object_store.url)}"]))
  # Values are quoted for the shell; none of them is a secret.
  common = {
    SOURCE_URL    = var.source_url
    SOURCE_SHA256 = var.source_sha256
    HEAD          = local.head
    TOKEN_FILE    = "${local.given}/ray-token"
  }
  values = merge(
    { "${var.name}-coordinator" = merge({
      ROLE      = "coordinator"
      ADDRESS   = local.address
      FARM_TOML = local.farm_toml
      DISK      = hcloud_volume.state.linux_device
      }, var.object_store.url == "" ? {} : {
      GIVEN_ENV = "${local.given}/bucket"
      ENDPOINT  = var.object_store.endpoint
    }) },
    { for name, group in local.servers : name => {
      ROLE    = "worker"
      NAME    = name
      NETWORK = var.cidr
      GRACE_S = "3600"
      OPTIONS = join(" ", concat(["--slots ${group.slots}"], [for feature in group.features : "--feature ${feature}"]))
    } },
  )
  user_data = {
    for name, values in local.values : name => join("\n", concat(
      ["#!/bin/sh"],
      [for key, value in merge(local.common, values) : "export ${key}='${replace(value, "'", "'\\''")}'"],
      [file("${path.module}/../scripts/setup.sh")],
    ))
  }
}

resource "hcloud_ssh_key" "operator" {
  name       = var.name
  public_key = var.ssh.public_key
  labels     = local.labels
}

resource "hcloud_network" "farm" {
  name     = var.name
  ip_range = var.cidr
  labels   = local.labels
}

resource "hcloud_network_subnet" "farm" {
  network_id   = hcloud_network.farm.id
  type         = "cloud"
  network_zone = local.zone
  ip_range     = var.cidr
}

# It filters what comes from the internet; Ray's nodes dial each other in the private network, which it does not touch.
resource "hcloud_firewall" "farm" {
  name   = var.name
  labels = local.labels
  rule {
    description = "ssh of those who bring secrets and updates"
    direction   = "in"
    protocol    = "tcp"
    port        = "22"
    source_ips  = var.ssh.from
  }
}

resource "hcloud_firewall" "clients" {
  count  = length(var.clients) == 0 ? 0 : 1
  name   = "${var.name}-clients"
  labels = local.labels
  rule {
    description = "HTTP of the coordinator, without TLS"
    direction   = "in"
    protocol    = "tcp"
    port        = "7878"
    source_ips  = var.clients
  }
}

# Journal, catalog, secrets and, without an object store, the cache itself: it outlives the server.
resource "hcloud_volume" "state" {
  name              = "${var.name}-state"
  size              = var.coordinator.volume_gb
  location          = var.location
  format            = "ext4"
  delete_protection = true
  labels            = local.labels
}

resource "hcloud_volume_attachment" "state" {
  volume_id = hcloud_volume.state.id
  server_id = hcloud_server.coordinator.id
}

resource "hcloud_server" "coordinator" {
  name         = "${var.name}-coordinator"
  server_type  = var.coordinator.server_type
  image        = var.image
  location     = var.location
  user_data    = local.user_data["${var.name}-coordinator"]
  ssh_keys     = [hcloud_ssh_key.operator.id]
  firewall_ids = concat([hcloud_firewall.farm.id], hcloud_firewall.clients[*].id)
  labels       = merge(local.labels, { role = "coordinator" })
  public_net {
    ipv4_enabled = true
    ipv6_enabled = false
  }
  network {
    subnet_id = hcloud_network_subnet.farm.id
    ip        = local.address
    alias_ips = []
  }
  # Another version is brought to the server that is here (README, Upgrade); replaced is what `-replace` names.
  lifecycle {
    ignore_changes = [user_data, image, ssh_keys]
  }
}

resource "hcloud_server" "worker" {
  for_each                 = local.servers
  name                     = each.key
  server_type              = each.value.server_type
  image                    = var.image
  location                 = var.location
  user_data                = local.user_data[each.key]
  ssh_keys                 = [hcloud_ssh_key.operator.id]
  firewall_ids             = [hcloud_firewall.farm.id]
  shutdown_before_deletion = true
  labels                   = merge(local.labels, { role = "worker" })
  public_net {
    ipv4_enabled = true
    ipv6_enabled = false
  }
  network {
    subnet_id = hcloud_network_subnet.farm.id
    alias_ips = []
  }
  lifecycle {
    ignore_changes = [user_data, image, ssh_keys]
  }
}

# Secrets go over ssh from files that are here, once for each server and again where another version is to be installed.
# Arguments of provisioners are in no state.
resource "terraform_data" "given" {
  for_each = merge(
    { "${var.name}-coordinator" = hcloud_server.coordinator },
    { for name, server in hcloud_server.worker : name => server },
  )
  triggers_replace = [each.value.id, sha256(local.user_data[each.key])]
  connection {
    host        = each.value.ipv4_address
    user        = "root"
    private_key = var.ssh.private_key_file == "" ? null : file(var.ssh.private_key_file)
    timeout     = "10m"
  }
  provisioner "remote-exec" {
    inline = ["umask 077 && mkdir -p ${local.given}"]
  }
  provisioner "file" {
    source      = var.secrets.ray_token_file
    destination = "${local.given}/ray-token.new"
  }
  provisioner "file" {
    content     = each.key == "${var.name}-coordinator" && var.secrets.bucket_file != "" ? file(var.secrets.bucket_file) : "\n"
    destination = "${local.given}/bucket.new"
  }
  provisioner "file" {
    content     = local.user_data[each.key]
    destination = "${local.given}/setup.sh"
  }
  # The first start waits for these files; when they come it ends. A later run is an upgrade.
  provisioner "remote-exec" {
    inline = [
      "cd ${local.given} && chmod 400 *.new && mv ray-token.new ray-token && mv bucket.new bucket",
      "cloud-init status --wait >/dev/null || true",
      "sh setup.sh",
    ]
  }
  depends_on = [hcloud_volume_attachment.state]
}

resource "hcloud_managed_certificate" "farm" {
  count        = var.domain == "" ? 0 : 1
  name         = "${var.name}-${var.domain}"
  domain_names = [var.domain]
  labels       = local.labels
}

resource "hcloud_load_balancer" "front" {
  count              = var.domain == "" ? 0 : 1
  name               = "${var.name}-front"
  load_balancer_type = "lb11"
  location           = var.location
  labels             = local.labels
}

resource "hcloud_load_balancer_network" "front" {
  count            = length(hcloud_load_balancer.front)
  load_balancer_id = hcloud_load_balancer.front[0].id
  subnet_id        = hcloud_network_subnet.farm.id
}

resource "hcloud_load_balancer_target" "front" {
  count            = length(hcloud_load_balancer.front)
  type             = "server"
  load_balancer_id = hcloud_load_balancer.front[0].id
  server_id        = hcloud_server.coordinator.id
  use_private_ip   = true
  depends_on       = [hcloud_load_balancer_network.front]
}

# It keeps nothing by itself and passes on every header, those of caches too.
resource "hcloud_load_balancer_service" "front" {
  count            = length(hcloud_load_balancer.front)
  load_balancer_id = hcloud_load_balancer.front[0].id
  protocol         = "https"
  listen_port      = 443
  destination_port = 7878
  http {
    certificates  = [hcloud_managed_certificate.farm[0].id]
    redirect_http = true
  }
  health_check {
    protocol = "http"
    port     = 7878
    interval = 5
    timeout  = 3
    retries  = 2
    http {
      path         = "/healthz"
      status_codes = ["200"]
    }
  }
}
