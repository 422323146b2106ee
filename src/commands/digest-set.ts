import { hash, randomBytes } from 'node:crypto'

/** Small tables grow one at a time, so that a copy never doubles the memory. */
const TABLES = 256
const MAX_LOAD = 0.85
const GROWTH = 1.5

/** The slots of one table, each two 32-bit halves of a digest; the second half of an empty slot is 0. */
interface Table { slots: Uint32Array, count: number }

export type DigestSet = ReturnType<typeof createDigestSet>

/**
 * Returns a set of texts, kept as 63-bit digests with a random salt: at most 15 bytes for each of many. That any two of
 * a million texts have one digest has a probability of 1 in 15 million.
 */
export function createDigestSet () {
  const salt = randomBytes(16).toString('hex')
  const tables = Array.from({ length: TABLES }, (): Table => ({ slots: new Uint32Array(32), count: 0 }))

  /** Returns the index of a digest in `slots`, or of the empty slot where it belongs. */
  function find (slots: Uint32Array, high: number, low: number): number {
    const capacity = slots.length / 2
    let slot = low % capacity
    const isOther = () => slots[2 * slot + 1] !== 0 && (slots[2 * slot] !== high || slots[2 * slot + 1] !== low)
    while (isOther()) slot = (slot + 1) % capacity
    return 2 * slot
  }

  function grow (table: Table): void {
    const { slots } = table
    table.slots = new Uint32Array(2 * Math.ceil(slots.length / 2 * GROWTH))
    for (let at = 0; at < slots.length; at += 2) {
      const [high, low] = [slots[at] as number, slots[at + 1] as number]
      if (low !== 0) table.slots.set([high, low], find(table.slots, high, low))
    }
  }

  function locate (text: string) {
    const digest = hash('sha256', salt + text)
    const high = parseInt(digest.slice(0, 8), 16)
    // Never 0, which marks an empty slot.
    const low = (parseInt(digest.slice(8, 16), 16) | 1) >>> 0
    const table = tables[high % TABLES] as Table
    return { table, high, low, at: find(table.slots, high, low) }
  }

  return {
    /** Adds a text. Returns false if the set has it. */
    add (text: string): boolean {
      const { table, high, low, at } = locate(text)
      if (table.slots[at + 1] !== 0) return false
      table.slots.set([high, low], at)
      table.count++
      if (table.count > table.slots.length / 2 * MAX_LOAD) grow(table)
      return true
    },

    has (text: string): boolean {
      const { table, at } = locate(text)
      return table.slots[at + 1] !== 0
    },

    /** Returns the memory of the set, in bytes. */
    bytes: () => tables.reduce((sum, { slots }) => sum + slots.byteLength, 0)
  }
}
