import { createGunzip } from 'node:zlib'
import { BodyError, type Lease } from '../body.ts'

/**
 * Resolves with an unpacked body. Rejects with a BodyError when it is no gzip, has more than `limit` bytes unpacked, or
 * exceeds its lease. It stops there, so a bomb takes no more memory than the limit.
 */
export function gunzip (body: Buffer, limit: number, lease: Lease): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = []
    let length = 0
    const unzip = createGunzip({ chunkSize: 65_536 })
    const fail = (error: BodyError) => {
      unzip.destroy()
      reject(error)
    }
    unzip.on('data', (chunk: Buffer) => {
      length += chunk.length
      if (length > limit) return fail(new BodyError('body_too_large'))
      if (!lease.grow(chunk.length)) return fail(new BodyError('overloaded'))
      chunks.push(chunk)
    })
    unzip.on('error', () => fail(new BodyError('invalid_request', 'must be gzip')))
    unzip.on('end', () => resolve(Buffer.concat(chunks)))
    unzip.end(body)
  })
}
