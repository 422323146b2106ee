import { BlockList, isIP, isIPv4, isIPv6 } from 'node:net'
import { normalizeIP } from '@fastify/rate-limit'

/** No address is longer. A forwarded address may be any text. */
const MAX_LENGTH = 64

/**
 * Returns the key by which an address is counted: IPv6 by /64, IPv4-mapped IPv6 as IPv4, at most 64 characters. Accepts
 * any text, such as the `address:port` that some proxies write into X-Forwarded-For.
 */
export function addressKey (ip: string): string {
  if (isIPv4(ip)) return ip
  const text = ip.slice(0, MAX_LENGTH)
  const bare = /^(\d+\.\d+\.\d+\.\d+):\d+$/.exec(text)?.[1] ?? /^\[(.+)\](?::\d+)?$/.exec(text)?.[1] ?? text
  // A zone (fe80::1%eth0) is local to a machine, and any text may follow the `%`.
  return isIPv6(bare) ? normalizeIP(bare.split('%')[0] as string) : bare.toLowerCase()
}

/** Returns a test for addresses in any of `networks`, each an address or a CIDR range. */
export function createNetworks (networks: string[]): (address: string) => boolean {
  const list = new BlockList()
  for (const network of networks) {
    const [address = '', bits] = network.split('/')
    const family = isIPv6(address) ? 'ipv6' : 'ipv4'
    if (bits === undefined) list.addAddress(address, family)
    else list.addSubnet(address, Number(bits), family)
  }
  return address => isIP(address) !== 0 && list.check(address, isIPv6(address) ? 'ipv6' : 'ipv4')
}

/** Returns an address as Mixpanel reads it, IPv4 where it is mapped into IPv6; undefined for a text that is none. */
export function plainAddress (ip: string): string | undefined {
  const bare = ip.replace(/^::ffff:(?=[\d.]+$)/i, '').replace(/%.*$/s, '')
  return isIP(bare) === 0 ? undefined : bare
}
