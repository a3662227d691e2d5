output "workers" {
  description = "Names of the workers, as `drover workers` shows them."
  value       = sort(keys(var.macs))
}

output "look" {
  description = "Commands that show what a Mac's worker says, by name."
  value       = { for name, mac in var.macs : name => "ssh -p ${mac.port} ${mac.user}@${mac.ssh_host} tail -f /var/log/drover-worker.log" }
}
